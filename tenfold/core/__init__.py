"""Pure tensor mathematics and statistics used by two methods or more: no models, no files."""
