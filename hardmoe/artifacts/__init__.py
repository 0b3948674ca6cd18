"""Artifacts: fingerprints, records, provenance, leases and the store that ties them together."""
