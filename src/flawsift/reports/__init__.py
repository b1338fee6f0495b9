"""Pages, pictures and tables for people, and files for other tools."""
