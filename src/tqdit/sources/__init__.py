"""The sources of float models: folders, checkpoint files, the Hub and models in memory."""
