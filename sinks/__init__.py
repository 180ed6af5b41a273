"""Stores that hold a view: one contract, one small file per store."""
