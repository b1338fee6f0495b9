"""The local page where a person decides image by image, and the training that follows."""
