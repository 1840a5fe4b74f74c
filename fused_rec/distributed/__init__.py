"""Devices, processes and signals: the only pmap, sharding, several hosts, requests to stop."""
