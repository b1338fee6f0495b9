"""One paper, one file. `flawsift.detector.DETECTORS` maps registry names to these classes.

inreach    InReaCh     nearest neighbour among the patches that recur across images
padim      PaDiM       a Gaussian per patch position
patchcore  PatchCore   nearest neighbour in a memory bank of patches
softpatch  SoftPatch   PatchCore without the most outlying patches, and with less trust in the others
"""
