"""A model for quire from outside. The version is that of the plugin contract (quire's docs/plugins.md)."""

quire_api_version = 1
