//! Loading, units and problems of the configuration. Floor 1: it knows no policy; the struct of the whole
//! file stands in `settings`.

pub mod failure;
pub mod fields;
pub mod file;
pub mod load;
pub mod networks;
pub mod problem;
pub mod rate;
mod sections;
mod text;
pub mod units;

pub(crate) use self::text::text;
pub use self::{
    failure::Failure,
    load::{Sources, Tree},
    networks::Networks,
    problem::{Check, Problem, Problems},
    rate::Rate,
    units::{ByteSize, HumanDuration, OneOrMany, Secret, Toggle},
};
