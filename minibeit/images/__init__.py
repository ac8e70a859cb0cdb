"""The parts of the image processor: loading, checked settings, their defaults by type, and the arithmetic."""
