"""Images by global id, what is drawn into them, and apart from them what a person knows of them."""
