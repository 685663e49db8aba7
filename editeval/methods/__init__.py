"""Editing methods: one file a method, strangers to each other."""
