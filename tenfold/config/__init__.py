"""One torch-free file per method: its frozen configuration, from which CLI, YAML and reference come."""
