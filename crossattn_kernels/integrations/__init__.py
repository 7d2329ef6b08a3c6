"""Published models on `cross_attention`: one module a library, imported by name; none is needed by the package."""
