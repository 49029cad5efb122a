"""The replica's store: a plain tree of ordinary files that a service can be started on."""
