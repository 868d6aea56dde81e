"""The demo family: small models made here, so that guidance shows something real."""
