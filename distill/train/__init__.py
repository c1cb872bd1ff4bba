"""One step: fetch, teach, exchange, train, record, save."""
