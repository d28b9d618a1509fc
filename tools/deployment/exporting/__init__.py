"""Parts of export.py: images to check with, running files, what is reported."""
