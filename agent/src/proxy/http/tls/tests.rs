//! Which certificates are taken for a server's, and how it is told that one is not.
