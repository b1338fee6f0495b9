"""What a frozen network says of an image: computed once, kept on disk, found by the image's content."""
