//! Tests of the store through its public interface.

#![allow(clippy::unwrap_used)] // everything here is test code, helpers included
#![allow(clippy::print_stdout)] // tables, and the lines a child process says what it does with

mod api;
mod corruption;
mod crash;
mod faults;
mod format;
mod hooked;
mod hostile;
mod together;
mod util;
