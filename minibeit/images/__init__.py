"""What the image processor is made of: loading, the settings checked, their defaults by type, and the arithmetic."""
