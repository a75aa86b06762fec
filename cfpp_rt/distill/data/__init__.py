"""Stored training data: folders of shards, their writers and the data source that reads them."""
