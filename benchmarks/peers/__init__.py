"""The contenders: this package and its peers. Each package has one file, imported only when it is needed."""
