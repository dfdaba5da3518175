"""Caches as other files and back. Every reader and writer streams sequence by sequence; none imports torch."""
