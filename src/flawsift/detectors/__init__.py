"""One method, one file. `flawsift.detectors.registry.DETECTORS` maps registry names to these classes.

cflow      CFlow       the likelihood of a patch under a flow conditioned on its position
destseg    DeSTSeg     where a student that restores corrupted images differs from its teacher
dinomaly   Dinomaly    reconstruction of grouped features through a noisy bottleneck
funad      FUNAD       a discriminator on pseudo-labels from a memory bank that is rebuilt as it learns
inreach    InReaCh     a memory bank of patches that recur across images
padim      PaDiM       a Gaussian per patch position
patchcore  PatchCore   nearest neighbour in a memory bank of patches
quorum     Quorum      mean distance to the nearest patches of several other images: what `fit` trains by default
rd         RD          a decoder that reconstructs the teacher's features from a bottleneck
simplenet  SimpleNet   a discriminator between patches and the same with noise on them
softpatch  SoftPatch   a memory bank without the most outlying patches, the others weighted
uniad      UniAD       reconstruction of features by attention to other patches only
"""
