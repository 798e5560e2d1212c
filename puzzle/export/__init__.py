"""Writes a student in formats that other programs read, and checks what was written in a process of its own.

Imports nothing, so that ``python -m puzzle.export.verify`` runs the module once only.
"""
