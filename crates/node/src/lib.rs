//! kvasir-node
