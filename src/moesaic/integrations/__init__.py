"""Bridges to other libraries, one module each, imported only by name: `import moesaic.integrations.transformers`."""
