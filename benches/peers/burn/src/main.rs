fn main() {
    let d = burn::tensor::Device::flex();
    let x: burn::tensor::Tensor<2> = burn::tensor::Tensor::ones([2, 2], &d);
    println!("{x}");
}
