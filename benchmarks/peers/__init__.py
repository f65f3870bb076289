"""The contenders: this package and its peers, one file a package, each imported only when it is wanted."""
