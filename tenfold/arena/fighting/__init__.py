"""A fight of two on a line at 60 frames a second, in integers: who answers late stands still for as long."""
