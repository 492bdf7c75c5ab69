"""memopt inside other training frameworks: one file each, imported only when named."""
