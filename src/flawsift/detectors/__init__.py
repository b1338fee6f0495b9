"""One paper, one file. `flawsift.detector.DETECTORS` maps registry names to these classes.

padim      PaDiM       a Gaussian per patch position
patchcore  PatchCore   nearest neighbour in a memory bank of patches
"""
