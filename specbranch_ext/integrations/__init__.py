"""Other libraries' models run by the ops: a module a library, which is imported by itself and needs that library."""
