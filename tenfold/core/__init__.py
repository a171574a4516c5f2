"""Pure tensor mathematics used by two methods or more: no models, no files."""
