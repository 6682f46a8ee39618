"""Hosts: what implements `core.host.Host`."""
