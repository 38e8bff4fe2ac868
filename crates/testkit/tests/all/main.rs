//! Tests of the test kit: the contract accepts a sound backend and notices a broken one.

mod contract;
