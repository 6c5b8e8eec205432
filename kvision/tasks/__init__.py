"""What a label, a box, a mask, a caption, an embedding is; one task, one file."""
