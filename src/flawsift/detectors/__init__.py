"""One paper, one file. `flawsift.detector.DETECTORS` maps registry names to these classes.

cflow      CFlow       the likelihood of a patch under a flow that knows its place
padim      PaDiM       a Gaussian per patch position
patchcore  PatchCore   nearest neighbour in a memory bank of patches
simplenet  SimpleNet   a discriminator between patches and the same with noise on them
"""
