"""Parallelism: devices and sharded arrays, several processes, and stop signals."""
