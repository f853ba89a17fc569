"""Measurements that the docs and notes quote; each prints its figures as one JSON line."""
