"""Stored training data: folders of shards, what is written into them and how a run reads them."""
