"""Where pictures come from: folders, archives, tables, documents, videos, this machine's or not."""
