"""Files that other runs read: written whole or not at all, in folders that one run at a time writes to."""
