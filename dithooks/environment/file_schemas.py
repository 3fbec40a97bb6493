"""The schemas of the files that this version reads and writes, as numbers in the files say."""

PLAN = (1, 2)  # 1: residuals, and outputs as they are
