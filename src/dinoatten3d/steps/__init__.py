"""The steps that commands are made of, one above the rooms: each reads a folder and writes a folder."""
