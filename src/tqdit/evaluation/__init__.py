"""The evaluation of generative models by sets of images, as papers do it."""
