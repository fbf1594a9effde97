"""Hosts that TidalDecode plugs into."""
