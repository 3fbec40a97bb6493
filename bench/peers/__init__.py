"""The methods that are compared: one file for each library, none of them imported before it is used."""
