"""Images by global id, derived views of them, and apart from them what a person knows about them."""
