"""Models as files for other programs; utils/export.py is the command."""
