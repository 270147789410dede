"""Operations on integer codes: their operands, their reference, their simulated twin, and the choice of a backend."""
