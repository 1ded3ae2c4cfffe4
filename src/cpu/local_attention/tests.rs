use super::*;
use crate::cpu::attention_rows::rows_delta;
use crate::tensor::philox::Philox;

fn numbers(n: usize, op: u32) -> Vec<f32> {
    let random = Philox { seed: 7, step: 0, op };
    (0..n as u64).map(|i| random.normal(i)).collect()
}

/// 3 images of 3 heads: two groups of lanes, the last with one pair; bands with halos.
fn params() -> Params {
    Params {
        n: 3,
        h: 23,
        w: 9,
        g: 3,
        d: 5,
        has_rel_h: 1,
        has_rel_w: 1,
        has_bias: 1,
        scale: 0.3,
        pieces: 1,
        part: 0,
        kh: 5,
        kw: 7,
        zero_border: 1,
        by_row: 0,
    }
}

/// y, lse, then dq, dk, dv and the tables' gradients.
fn everything(p: &Params) -> Vec<Vec<f32>> {
    let len = (p.n * p.h * p.w * p.g * p.d) as usize;
    let [q, k, v, dy] = [0, 1, 2, 3].map(|i| numbers(len, i));
    let tables = numbers(p.layout().offsets()[3], 4);
    let rows = len / p.d as usize;
    let (mut y, mut lse, mut stats) = (vec![0.0; len], vec![0.0; rows], vec![0.0; 2 * rows]);
    forward(p, [&q, &k, &v], &tables, &mut y, &mut lse);
    rows_delta(p.d as usize, &y, &dy, &lse, &mut stats);
    let (mut dq, mut dk, mut dv) = (y.clone(), y.clone(), y.clone());
    let mut dtables = tables.clone();
    let x = Inputs { q: &q, k: &k, v: &v, dy: &dy, stats: &stats, tables: &tables };
    backward(p, x, [&mut dq, &mut dk, &mut dv], &mut dtables);
    vec![y, lse, dq, dk, dv, dtables]
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| everything(&params()))
    };
    assert!(with(1) == with(3), "one and three threads differ");
}

/// Every pair and row belongs to one task, and a band is no lower than its halo.
#[test]
fn tasks_cover_the_batch_once() {
    let p = params();
    let all = tasks(&p, 8, 7);
    assert_eq!(all.len(), 2 * 4, "four bands of 6 rows or less for each group of lanes");
    let places: usize = all.iter().map(|t| t.live * t.rows.len()).sum();
    assert_eq!(places, (p.n * p.g * p.h) as usize);
    assert!(all.iter().all(|t| t.rows.len() >= 4 || t.rows.end == p.h as usize));
    assert_eq!(tasks(&Params { n: 64, ..p }, 8, 7).len(), 24, "many pairs: whole maps");
}

#[test]
fn windows_at_the_edges() {
    let p = params();
    assert_eq!([0, 1, 4, 8].map(|x| columns(&p, x)), [3..7, 2..7, 0..7, 0..4]);
    let narrow = Params { w: 2, ..p };
    assert_eq!([0, 1].map(|x| columns(&narrow, x)), [3..5, 2..4]);
    assert_eq!([0, 1, 2].map(|a| key_row(&p, 1, a)), [None, Some(0), Some(1)]);
    assert_eq!(key_row(&p, 22, 3), None);
}
